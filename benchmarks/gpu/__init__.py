"""Training steps on a GPU beside the field's: ``python -m benchmarks.gpu.run --shape S3``. No GPU has run it yet."""
