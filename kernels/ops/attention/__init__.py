"""Attention: softmax(q k / sqrt(d)) v with masks and dropout."""
