"""The chat page at /: plain files, nothing from elsewhere, talking to the OpenAI routes of its own server."""
