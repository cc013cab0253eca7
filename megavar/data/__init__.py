"""Sources of images, their order, transforms and batches."""
