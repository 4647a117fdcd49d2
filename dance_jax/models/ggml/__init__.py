"""Models in GGUF files, the format of llama.cpp: read as if they were Hugging Face directories."""
