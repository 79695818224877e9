"""Export to ONNX, for onnxruntime."""
