"""The sum of clipped per-example gradients, which DP-SGD adds noise to, three ways."""
