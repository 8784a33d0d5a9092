"""The profile of the report that is tested as text and in a browser; its plan places weights in every way there is."""

PROFILE = """\
version: 1
model: {source: llama}
workload: {context_length: 64}
hardware:
  devices:
    "cuda:[0-1]": {memory: 2MiB, bandwidth: 1TB/s, flops: 10TFLOP/s}
    cpu: {memory: 1GiB, bandwidth: 50GB/s, flops: 1TFLOP/s}
  links: {host: 25GB/s, peer: 10GB/s}
placement:
  strategy: sequential
  max_memory: {0: 320KiB, 1: 320KiB}
  pins: [{match: "model.layers.5.mlp", device: cpu, compute: cpu}, {match: lm_head, device: cuda:1}]
"""
