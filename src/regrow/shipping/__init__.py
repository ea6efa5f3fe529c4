"""Ship a finished network: store it as safetensors, fold its norms, export it to ONNX."""
