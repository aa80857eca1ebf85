"""Weights that a checkpoint brings quantised: AWQ, GPTQ, compressed-tensors, fp8 and mxfp4 in safetensors files."""
