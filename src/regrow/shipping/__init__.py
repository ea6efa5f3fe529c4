"""A finished network as a file: safetensors, ONNX, norms folded."""
