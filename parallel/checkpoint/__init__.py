"""Files: checkpoints, Hugging Face directories, and the safetensors files that both consist of."""
