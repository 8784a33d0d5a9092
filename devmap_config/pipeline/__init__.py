"""Plans for vLLM: contiguous stages of layers, over the cards of one host or several."""
