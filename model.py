"""The networks, their loss, loading saved weights, and codes of images."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import data

BATCH = 128  # images at a time where none is trained on


class VAE(nn.Module):
    """What the networks share (Kingma & Welling, 2014). Images are [N, 1, 28, 28] float32 in [0,
    1], latent vectors [N, latent_dim]. A subclass gives `features`, what its hidden layers make of
    images, the last of which `fc_mu` and `fc_log` take, and `decode`, from z to images."""

    def encode(self, x):
        """Return μ(x) and log σ²(x), both [N, latent_dim]."""
        h = self.features(x)[-1].flatten(1)
        return self.fc_mu(h), self.fc_log(h)

    def reparameterize(self, mu, logvar):
        """Draw z = μ + exp(½ log σ²) ⊙ ε with ε ~ N(0, I), all [N, latent_dim]."""
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)

    def forward(self, x):
        """Return (reconstruction [N, 1, 28, 28] in [0, 1], mu, logvar)."""
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


class ConvVAE(VAE):
    """The report's convolutional VAE: 440,833 parameters at latent_dim = 32. Layers carry the
    report's names, so a `state_dict` goes both ways between its class and this."""

    def __init__(self, latent_dim=32):
        super().__init__()
        self.enc1 = nn.Conv2d(1, 32, kernel_size=4, stride=2, padding=1)  # 32×14×14
        self.enc2 = nn.Conv2d(32, 64, 4, 2, 1)  # 64×7×7
        self.enc3 = nn.Conv2d(64, 128, 4, 2, 1)  # 128×3×3
        self.fc_mu = nn.Linear(128 * 3 * 3, latent_dim)
        self.fc_log = nn.Linear(128 * 3 * 3, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 128 * 3 * 3)
        self.dec1 = TransposedConv2d(128, 64, 4, 2, 1, output_padding=1)  # 64×7×7
        self.dec2 = TransposedConv2d(64, 32, 4, 2, 1)  # 32×14×14
        self.dec3 = TransposedConv2d(32, 1, 4, 2, 1)  # 1×28×28

    def features(self, x):
        """Return what the three convolutions make of x: 32×14×14, 64×7×7, 128×3×3 an image."""
        h1 = F.relu_(self.enc1(x))
        h2 = F.relu_(self.enc2(h1))
        return h1, h2, F.relu_(self.enc3(h2))

    def decode(self, z):
        h = F.relu_(self.fc_dec(z)).view(-1, 128, 3, 3)
        h = F.relu_(self.dec1(h))
        h = F.relu_(self.dec2(h))
        return torch.sigmoid(self.dec3(h))


class FullyConnectedVAE(VAE):
    """784–400–latent_dim–400–784 with ReLU, after Kingma & Welling (2014). The report compares its
    network with "a fully connected VAE" without describing it."""

    def __init__(self, latent_dim=32):
        super().__init__()
        self.fc_enc = nn.Linear(28 * 28, 400)
        self.fc_mu = nn.Linear(400, latent_dim)
        self.fc_log = nn.Linear(400, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 400)
        self.fc_out = nn.Linear(400, 28 * 28)

    def features(self, x):
        return (F.relu_(self.fc_enc(x.flatten(1))),)

    def decode(self, z):
        h = F.relu_(self.fc_dec(z))
        return torch.sigmoid(self.fc_out(h)).view(-1, 1, 28, 28)


class DeepConvVAE(VAE):
    """What the report proposes: more convolutions, up to 256 filters, BatchNorm, LeakyReLU."""

    def __init__(self, latent_dim=32):
        super().__init__()

        def block(layer):
            return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.LeakyReLU(0.2))

        self.enc = nn.Sequential(
            block(nn.Conv2d(1, 32, kernel_size=4, stride=2, padding=1)),  # 32×14×14
            block(nn.Conv2d(32, 64, 4, 2, 1)),  # 64×7×7
            block(nn.Conv2d(64, 128, 4, 2, 1)),  # 128×3×3
            block(nn.Conv2d(128, 256, 3, 1, 1)),  # 256×3×3
        )
        self.fc_mu = nn.Linear(256 * 3 * 3, latent_dim)
        self.fc_log = nn.Linear(256 * 3 * 3, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 256 * 3 * 3)
        self.dec = nn.Sequential(
            block(nn.Conv2d(256, 128, 3, 1, 1)),  # 128×3×3
            block(TransposedConv2d(128, 64, 4, 2, 1, output_padding=1)),  # 64×7×7
            block(TransposedConv2d(64, 32, 4, 2, 1)),  # 32×14×14
            TransposedConv2d(32, 1, 4, 2, 1),  # 1×28×28
        )

    def features(self, x):
        return [x := block(x) for block in self.enc]

    def decode(self, z):
        h = F.leaky_relu(self.fc_dec(z), 0.2).view(-1, 256, 3, 3)
        return torch.sigmoid(self.dec(h))


MODELS = {"conv": ConvVAE, "fc": FullyConnectedVAE, "deep": DeepConvVAE}


def reconstruction_bce(recon_x, x):
    """Binary cross-entropy −Σ [x log x̂ + (1−x) log(1−x̂)] in nats, summed over pixels and batch. A
    NaN in `recon_x` gives NaN, where PyTorch's own function would abort (on CUDA for good)."""
    broken = recon_x.isnan()
    bce = F.binary_cross_entropy(recon_x.masked_fill(broken, 0), x, reduction="sum")
    return bce.masked_fill(broken.any(), torch.nan)


def kl_divergence(mu, logvar):
    """KL(N(μ, σ²) ‖ N(0, I)) = −½ Σ (1 + log σ² − μ² − σ²) in nats, summed like the BCE."""
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def loss_function(recon_x, x, mu, logvar):
    """The report's loss, BCE + KLD in nats, summed; train.py takes the terms apart, to log both."""
    return reconstruction_bce(recon_x, x) + kl_divergence(mu, logvar)


# --- Loading, and codes -------------------------------------------------------------------


def load_model(run):
    """Return the network of a run (a `data.Run`) with its weights, on the CPU, for evaluation.
    Raises UserError if the run has no weights, or those of another network than its settings."""
    if run.weights is None:
        command = data.train_command(run.settings, "runs/anew")
        raise data.UserError(f"{run.path} has no {data.WEIGHTS}; this makes one anew: {command}")
    model = MODELS[run.settings["model"]](run.settings["latent_dim"])
    try:
        model.load_state_dict(run.weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        files = f"{data.STATE}, or {data.CONFIG} and {data.WEIGHTS}"
        raise data.UserError(f"{run.path}: settings and weights ({files}) disagree") from error
    return model.eval()


@torch.no_grad()
def latent_means(model, images):
    """Return μ(x), [N, latent_dim] float32, of images on the CPU. In float64, so that what a
    machine rounds differently never reaches the forest."""
    model = copy.deepcopy(model).double()
    return torch.cat([model.encode(x.double())[0].float() for x in images.split(BATCH)])


def active_dimensions(mu):
    """Return how many dimensions of μ [N, latent_dim] are active: a variance above 0.01 (Burda et
    al., 2016)."""
    return (mu.var(dim=0) > 0.01).sum().item()


def sample_mixture(model, images, n):
    """Return n codes [n, latent_dim] from a mixture of Gaussians fitted to μ of images, an estimate
    of where codes lie (Ghosh et al., 2020). It has 50, fitted to the first 10,000 images, as chosen
    in results/mixture.txt, or fewer, so that each has at least six different codes a dimension.
    Above 128 dimensions covariances are diagonal: full ones take time with the cube of these."""
    from sklearn.mixture import GaussianMixture  # here, for train.py needs no second to load it

    mu = latent_means(model, images[:10_000]).double()
    full = mu.shape[1] <= 128
    carried = len(mu.unique(dim=0)) // (6 * mu.shape[1] if full else 6)
    kind = {"covariance_type": "full" if full else "diag", "tol": 0.03, "random_state": 42}
    mixture = GaussianMixture(min(50, max(1, carried)), **kind).fit(mu)
    return torch.tensor(mixture.sample(n)[0]).float()


# --- Faster, same numbers -----------------------------------------------------------------


class TransposedConv2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d in the form that is fastest on a CPU, equal to it up to rounding. oneDNN,
    with which PyTorch convolves there, is slow at two things: a bias, so that is added apart, and a
    single output channel, so that is left to PyTorch's own kernel."""

    def forward(self, x):
        """Return [N, out_channels, H', W'] of x, [N, in_channels, H, W]."""
        # The context manager `mkldnn.flags` would do, but prints a warning about TF32.
        before = torch.backends.mkldnn.enabled
        form = self.stride, self.padding, self.output_padding
        torch.backends.mkldnn.enabled = before and self.out_channels > 1
        try:
            y = F.conv_transpose2d(x, self.weight, None, *form)
        finally:
            torch.backends.mkldnn.enabled = before
        return y.add_(self.bias.view(-1, 1, 1))
