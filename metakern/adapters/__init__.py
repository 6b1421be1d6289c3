"""LoRA for whole models, and the PEFT library's file format for it."""
