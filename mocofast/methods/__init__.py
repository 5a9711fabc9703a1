"""Methods of pretraining, one a file: MoCo and its relatives."""
