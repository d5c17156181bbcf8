"""What a parameter is: its layout over the axes, its initial values, and the labels it is trained on."""
