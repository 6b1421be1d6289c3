"""LoRA for whole models, changes of weights as LoRA, and adapters on disk in the format of the PEFT library."""
