"""What makes the models and the attention known to Transformers and PEFT."""
