"""A trainer for foveated vision-language models. The library: model, data, training step. It never imports ray."""

__version__ = "0.1.0"
