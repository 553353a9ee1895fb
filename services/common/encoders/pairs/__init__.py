"""
Scorers of pairs of texts, cross-encoders whatever their head: token ids of both in, the model's outputs out.

`opening.open_pair_model` is the way in. Importing this package imports neither torch nor OpenVINO.
"""
