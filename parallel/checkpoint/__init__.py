"""Files: checkpoints, Hugging Face directories, and the safetensors below both."""
