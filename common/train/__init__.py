"""Fine-tuning: the recipe, the launch, the optimiser, the one loop, and the steps that the stages share."""
