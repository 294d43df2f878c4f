"""Generate text with an exported model, onnxruntime and numpy alone.

python run_onnx.py runs/first/onnx "def main("
python run_onnx.py runs/first/onnx "def main(" _int8
"""

import json
import sys

import numpy
import onnxruntime

if len(sys.argv) < 2:
    sys.exit(__doc__)
folder, prompt, suffix = (*sys.argv[1:], "", "")[:3]
chunk, step = (onnxruntime.InferenceSession(f"{folder}/{name}{suffix}.onnx") for name in ("chunk", "step"))
metadata = step.get_modelmeta().custom_metadata_map
tokens = [token.encode("latin-1") for token in json.loads(metadata["tokens"])]
ends = json.loads(metadata["ends"])

backward = metadata.get("direction") == "backward"  # reads each text from its end
text, ids, written = (prompt[::-1] if backward else prompt).encode(errors="surrogateescape"), [], b""
if all(token[:1] in b" \n" for token in tokens):  # words, each with a space before it, and line ends
    text = b"\n".join(b"".join(b" " + word for word in line.split()) for line in text.split(b"\n"))
if not any(token and text.startswith(token) for token in tokens):  # other texts may begin without that space, too
    text = text and b" " + text
while text:  # the longest token that the text begins with
    ids.append(max(range(len(tokens)), key=lambda index: len(tokens[index]) * text.startswith(tokens[index])))
    if not tokens[ids[-1]] or not text.startswith(tokens[ids[-1]]):
        sys.exit(f"run_onnx.py: the model has no token for the beginning of {text.decode(errors='replace')!r}.")
    text = text[len(tokens[ids[-1]]) :]
ids = ids or ends[:1] or [0]

shapes = {part.name: (1, *part.shape[1:]) for part in step.get_inputs()[1:]}
state = {name: numpy.zeros(shape, numpy.float32) for name, shape in shapes.items()}
random, graph = numpy.random.default_rng(0), chunk
for _ in range(300):
    logits, *parts = graph.run(None, {"input_ids": numpy.array([ids]), **state})
    state, graph = dict(zip(state, parts, strict=True)), step
    probabilities = numpy.exp((logits[0, -1] - logits[0, -1].max()).astype(float) / 0.8)  # a temperature of 0.8
    ids = [int(random.choice(len(probabilities), p=probabilities / probabilities.sum()))]
    if ids[0] in ends:
        break
    written += tokens[ids[0]]
    if not backward:
        sys.stdout.buffer.write(tokens[ids[0]])
        sys.stdout.flush()
sys.stdout.buffer.write(written.decode(errors="replace")[::-1].encode() if backward else b"")
print()
