"""Export to ONNX, and to int8 ONNX."""
