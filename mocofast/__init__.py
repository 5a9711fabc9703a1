"""Fast momentum-contrast pretraining."""
