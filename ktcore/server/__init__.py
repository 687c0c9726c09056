"""HTTP over a loaded model: the OpenAI and Ollama APIs, metrics, keys, limits; needs the extra `server`."""
