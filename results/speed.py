"""Time the report's training loop and train.py in turn. Print seconds per epoch and their ratio.

Run it in the root of the repository, on a machine that does nothing else:

    python results/speed.py --pairs 5

The tests use `ReportVAE` and `report_loss` as the reference for the network and its loss.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

import data


class ReportVAE(nn.Module):
    """The report's network, written from its description with PyTorch's own layers."""

    def __init__(self, latent_dim=32):
        super().__init__()
        self.enc1 = nn.Conv2d(1, 32, kernel_size=4, stride=2, padding=1)
        self.enc2 = nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1)
        self.enc3 = nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1)
        self.fc_mu = nn.Linear(1152, latent_dim)
        self.fc_log = nn.Linear(1152, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 1152)
        self.dec1 = nn.ConvTranspose2d(
            128, 64, kernel_size=4, stride=2, padding=1, output_padding=1
        )
        self.dec2 = nn.ConvTranspose2d(64, 32, kernel_size=4, stride=2, padding=1)
        self.dec3 = nn.ConvTranspose2d(32, 1, kernel_size=4, stride=2, padding=1)

    def forward(self, x):
        """Return the reconstruction [N, 1, 28, 28], mu and logvar [N, latent_dim]."""
        h = F.relu(self.enc1(x))
        h = F.relu(self.enc2(h))
        h = F.relu(self.enc3(h)).flatten(1)
        mu = self.fc_mu(h)
        logvar = self.fc_log(h)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        h = F.relu(self.fc_dec(z)).view(-1, 128, 3, 3)
        h = F.relu(self.dec1(h))
        h = F.relu(self.dec2(h))
        return torch.sigmoid(self.dec3(h)), mu, logvar


def report_loss(recon_x, x, mu, logvar):
    """Return the report's loss, BCE + KLD, summed over pixels, latent dimensions and images."""
    bce = F.binary_cross_entropy(recon_x, x, reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())
    return bce + kld


class ImageByImage(Dataset):
    """A split as torchvision provides it: each image is converted when it is used."""

    def __init__(self, images, labels):
        self.images = (images[:, 0] * 255).round().byte()
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index].numpy())
        return ToTensor()(image), int(self.labels[index])


def report_loop(root, epochs):
    """Train as the report does, with 4 worker processes, and read the loss in each step.

    Print the seconds of each epoch, which include training and testing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (train, test), _ = data.load_splits(root)
    train_loader = DataLoader(
        ImageByImage(*train),
        batch_size=128,
        shuffle=True,
        num_workers=4,
        pin_memory=device.type == "cuda",
    )
    test_loader = DataLoader(
        ImageByImage(*test),
        batch_size=128,
        num_workers=4,
        pin_memory=device.type == "cuda",
    )
    model = ReportVAE().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    for _ in range(epochs):
        start = time.perf_counter()
        train_loss = 0.0
        model.train()
        for x, _ in train_loader:
            x = x.to(device)
            optimizer.zero_grad()
            recon, mu, logvar = model(x)
            loss = report_loss(recon, x, mu, logvar)
            loss.backward()
            optimizer.step()
            train_loss += loss.item()
        test_loss = 0.0
        model.eval()
        with torch.no_grad():
            for x, _ in test_loader:
                x = x.to(device)
                recon, mu, logvar = model(x)
                test_loss += report_loss(recon, x, mu, logvar).item()
        print(time.perf_counter() - start, flush=True)


def time_report_loop(root, epochs):
    """Return the seconds of each epoch of the report's loop, in a process of its own."""
    command = [sys.executable, __file__, "--only-report", "--data", str(root)]
    command += ["--epochs", str(epochs)]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    # The first line that is printed says where the images come from.
    return [float(line) for line in process.stdout.splitlines()[1:]]


def time_train_script(root, epochs):
    """Return the seconds of each epoch of train.py."""
    # The report uses CUDA if it is available, and otherwise the CPU.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, str(ROOT / "train.py"), "--run", run, "--data", str(root)]
        command += ["--epochs", str(epochs), "--device", device]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(Path(run, "losses.csv"), encoding="utf-8") as file:
            return [float(row["seconds"]) for row in csv.DictReader(file)]


def main():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Time the report's training loop and train.py in turn.",
    )
    parser.add_argument(
        "--pairs",
        type=data.positive_int,
        metavar="N",
        default=3,
        help="number of times that both are timed (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=data.positive_int,
        metavar="N",
        default=2,
        help="number of epochs each time (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=data.folder,
        metavar="DIR",
        default=data.DEFAULT_ROOT,
        help="folder of Fashion-MNIST (default: %(default)s)",
    )
    parser.add_argument(
        "--only-report", action="store_true", help="time only the report's training loop"
    )
    args = parser.parse_args()
    if args.only_report:
        report_loop(args.data, args.epochs)
        return
    data.load_splits(args.data)  # fetches the data set if it is missing
    ratios = []
    for pair in range(1, args.pairs + 1):
        report_seconds = time_report_loop(args.data, args.epochs)
        our_seconds = time_train_script(args.data, args.epochs)
        ratio = sum(report_seconds) / sum(our_seconds)
        ratios.append(ratio)
        report_text = " ".join(f"{seconds:.2f}" for seconds in report_seconds)
        our_text = " ".join(f"{seconds:.2f}" for seconds in our_seconds)
        print(f"pair {pair}: report {report_text} s, train.py {our_text} s, ratio {ratio:.2f}")
    spread = f" ± {stdev(ratios):.2f}" if len(ratios) > 1 else ""
    print(
        f"torch {torch.__version__}: train.py is {mean(ratios):.2f}{spread} times as fast as the "
        "report's loop"
    )


if __name__ == "__main__":
    data.run_script(main, when_interrupted="Run the same command again.")
