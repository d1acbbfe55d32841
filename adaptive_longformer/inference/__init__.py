"""Ready-made uses of trained models, where Transformers has no pipeline for them."""
