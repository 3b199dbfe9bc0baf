"""Time the report's training loop and train.py in turn, and print seconds an epoch and their ratio.

Run it on a machine that does nothing else: python results/speed.py
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data import load_splits


class ReportVAE(nn.Module):
    """The report's network, written from its table with PyTorch's own layers."""

    def __init__(self, latent_dim=32):
        super().__init__()
        self.enc1 = nn.Conv2d(1, 32, 4, 2, 1)
        self.enc2 = nn.Conv2d(32, 64, 4, 2, 1)
        self.enc3 = nn.Conv2d(64, 128, 4, 2, 1)
        self.fc_mu = nn.Linear(1152, latent_dim)
        self.fc_log = nn.Linear(1152, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 1152)
        self.dec1 = nn.ConvTranspose2d(128, 64, 4, 2, 1, output_padding=1)
        self.dec2 = nn.ConvTranspose2d(64, 32, 4, 2, 1)
        self.dec3 = nn.ConvTranspose2d(32, 1, 4, 2, 1)

    def forward(self, x):
        h = F.relu(self.enc3(F.relu(self.enc2(F.relu(self.enc1(x)))))).flatten(1)
        mu, logvar = self.fc_mu(h), self.fc_log(h)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        h = F.relu(self.fc_dec(z)).view(-1, 128, 3, 3)
        return self.dec3(F.relu(self.dec2(F.relu(self.dec1(h))))).sigmoid(), mu, logvar


def report_loss(recon_x, x, mu, logvar):
    """The report's loss: BCE and KLD, both summed over everything."""
    bce = F.binary_cross_entropy(recon_x, x, reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())


class Pictures(Dataset):
    """A split as torchvision's FashionMNIST hands it out: an image at a time, made a tensor of."""

    def __init__(self, images, labels):
        self.images, self.labels = (images[:, 0] * 255).round().byte(), labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return ToTensor()(Image.fromarray(self.images[index].numpy())), int(self.labels[index])


def report_loop(root, epochs):
    """Train as the report does, with 4 worker processes and the loss read at each step.

    Print the seconds of each epoch, train and test pass together.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = [Pictures(*split) for split in load_splits(root)]
    options = {"batch_size": 128, "num_workers": 4, "pin_memory": device.type == "cuda"}
    train_loader = DataLoader(splits[0], shuffle=True, **options)
    test_loader = DataLoader(splits[1], **options)
    model = ReportVAE().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    for _ in range(epochs):
        start, train_loss, test_loss = time.perf_counter(), 0.0, 0.0
        model.train()
        for x, _ in train_loader:
            x = x.to(device)
            optimizer.zero_grad()
            recon, mu, logvar = model(x)
            loss = report_loss(recon, x, mu, logvar)
            loss.backward()
            optimizer.step()
            train_loss += loss.item()
        model.eval()
        with torch.no_grad():
            for x, _ in test_loader:
                x = x.to(device)
                recon, mu, logvar = model(x)
                test_loss += report_loss(recon, x, mu, logvar).item()
        print(time.perf_counter() - start, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="of timings, one of each")
    parser.add_argument("--epochs", type=int, default=2, help="in a timing")
    data_help = "folder of Fashion-MNIST, which is fetched if it is not there"
    parser.add_argument("--data", default=ROOT / "data" / "fashion-mnist", help=data_help)
    parser.add_argument("--only-report", action="store_true", help="time the report's loop alone")
    args = parser.parse_args()
    if args.only_report:
        report_loop(args.data, args.epochs)
        return
    load_splits(args.data)  # fetches the data set where it is missing
    same = ["--data", str(args.data), "--epochs", str(args.epochs)]
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the report knows no other
    ratios = []
    for pair in range(args.pairs):
        loop = [sys.executable, __file__, "--only-report", *same]
        printed = subprocess.run(loop, check=True, capture_output=True, text=True).stdout
        report = [float(line) for line in printed.split()]
        with tempfile.TemporaryDirectory() as run:
            train = [sys.executable, str(ROOT / "train.py"), "--run", run, "--device", device]
            subprocess.run([*train, *same], check=True, capture_output=True)
            with open(Path(run, "losses.csv"), encoding="utf-8") as file:
                ours = [float(row["seconds"]) for row in csv.DictReader(file)]
        ratios.append(sum(report) / sum(ours))
        seconds = [" ".join(f"{value:.2f}" for value in values) for values in (report, ours)]
        print(f"pair {pair + 1}: report {seconds[0]} s, train.py {seconds[1]} s, {ratios[-1]:.2f}")
    spread = f" ± {stdev(ratios):.2f}" if len(ratios) > 1 else ""
    print(f"torch {torch.__version__}: train.py is faster by {mean(ratios):.2f}{spread}")


if __name__ == "__main__":
    main()
