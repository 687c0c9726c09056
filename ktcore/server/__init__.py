"""HTTP over a loaded model: the OpenAI API, with keys, limits and streaming; needs the extra `server`."""
