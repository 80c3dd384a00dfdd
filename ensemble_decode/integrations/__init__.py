"""The ensemble in other people's programs."""
