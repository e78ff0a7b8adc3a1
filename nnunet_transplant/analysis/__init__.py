"""Why models merge or do not: curvature, interference, coefficients, the loss between models."""
