"""LoRA for whole models, and adapters on disk in the format of the PEFT library."""
