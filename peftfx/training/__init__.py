"""Training on HF models: the Trainer's handle for adapters, and jobs from files."""
