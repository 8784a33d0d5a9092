"""An HTTP server over a loaded model, by the protocol that OpenAI's clients speak."""
