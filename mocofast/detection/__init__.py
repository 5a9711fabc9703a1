"""Detection and segmentation: trains torchvision's models on the encoder of a checkpoint."""
