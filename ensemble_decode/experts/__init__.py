"""Expert pairs from text: data, training, and the folder that ``LLM(pairs=…)`` takes."""
