"""Edits as LoRA adapters: PEFT's (which vLLM loads too) and llama.cpp's. Below Edit, whose methods call them."""
