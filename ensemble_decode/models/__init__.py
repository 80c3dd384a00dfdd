"""transformers' models made fast in place, and what binds several of them into an ensemble."""
