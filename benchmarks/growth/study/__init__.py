"""What growth saves: grown runs against runs from scratch that were tuned as well, at the end of their decay.

`sizes` has the models and their tuned values, `arms` the ways to grow, `runs` trains and keeps results, `results` works
out what was saved, `page` writes tables and the picture. Every run is the program's own `flm train`.
"""
