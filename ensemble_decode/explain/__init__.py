"""What each pair did to each token: analysis, and ways to show them. ``LLM.explain`` is the way in."""
