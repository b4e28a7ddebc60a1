import torch
from torch.utils.data import DataLoader
from train import Net, Stripes

import trtq

model = Net().eval()
model.load_state_dict(torch.load("model.pt"))

program = torch.onnx.export(
    model,
    (torch.zeros(2, 1, 16, 16),),
    input_names=["image"],
    output_names=["logits"],
    dynamic_shapes=({0: "batch"},),  # engines then take any batch size within their profile
)

result = trtq.deploy(
    program,  # or the path of an ONNX file, or an onnx.ModelProto
    data=DataLoader(Stripes(256, seed=1), batch_size=32),  # a few hundred samples as in use
    eval=DataLoader(Stripes(1000, seed=2), batch_size=50),  # others, with labels
    metric="top1",
    max_drop=0.01,
    output="out",
    save_data=True,  # writes them into out/, so that out/recipe.toml runs again
)
print(result)
print(result.verdict.text())
