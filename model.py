"""The VAE: networks, loss, latent means and samples."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import data
from data import CONFIG, WEIGHTS, UserError

# --- Networks -----------------------------------------------------------------------------


class VAE(nn.Module):
    """A variational autoencoder (Kingma & Welling, 2014). Base class of the networks in MODELS.

    Images x are [N, 1, 28, 28] float32 in [0, 1]. Latent means mu, log variances logvar and latent
    codes z are [N, latent_dim].

    A subclass takes `latent_dim`. It defines the layers `fc_mu` and `fc_log`, and the methods
    `features` and `decode`. `features` returns the outputs of all hidden layers of the encoder:
    feature matching compares them all, and `encode` uses the last one.
    """

    def encode(self, x):
        """Return mu(x) and log sigma²(x), both [N, latent_dim]."""
        h = self.features(x)[-1].flatten(1)
        return self.fc_mu(h), self.fc_log(h)

    def reparameterize(self, mu, logvar):
        """Draw z = mu + exp(logvar / 2) * epsilon, epsilon ~ N(0, I). All are [N, latent_dim]."""
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)

    def forward(self, x):
        """Return the reconstruction [N, 1, 28, 28] in [0, 1], mu and logvar."""
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


class ConvVAE(VAE):
    """The network of the report. It has 440,833 parameters with 32 latent dimensions.

    The layers have the names of the report, so a state_dict of the report's class can be loaded
    into this one, and the other way around.
    """

    def __init__(self, latent_dim=32):
        super().__init__()
        self.enc1 = nn.Conv2d(1, 32, kernel_size=4, stride=2, padding=1)  # 32×14×14
        self.enc2 = nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1)  # 64×7×7
        self.enc3 = nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1)  # 128×3×3
        self.fc_mu = nn.Linear(128 * 3 * 3, latent_dim)
        self.fc_log = nn.Linear(128 * 3 * 3, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 128 * 3 * 3)
        # TransposedConv2d is nn.ConvTranspose2d, but faster on a CPU. See the end of this file.
        self.dec1 = TransposedConv2d(
            128, 64, kernel_size=4, stride=2, padding=1, output_padding=1
        )  # 64×7×7
        self.dec2 = TransposedConv2d(64, 32, kernel_size=4, stride=2, padding=1)  # 32×14×14
        self.dec3 = TransposedConv2d(32, 1, kernel_size=4, stride=2, padding=1)  # 1×28×28

    def features(self, x):
        """Return the outputs of the three convolutions.

        They are [N, 32, 14, 14], [N, 64, 7, 7] and [N, 128, 3, 3].
        """
        # The in-place ReLU makes a training step 3 % faster, and overwrites the output of the
        # convolution. A forward hook on enc1, enc2 or enc3 must clone that output to keep it.
        h1 = F.relu_(self.enc1(x))
        h2 = F.relu_(self.enc2(h1))
        h3 = F.relu_(self.enc3(h2))
        return h1, h2, h3

    def decode(self, z):
        """Return images [N, 1, 28, 28] in [0, 1] for latent codes z [N, latent_dim]."""
        h = F.relu_(self.fc_dec(z)).view(-1, 128, 3, 3)
        h = F.relu_(self.dec1(h))
        h = F.relu_(self.dec2(h))
        return torch.sigmoid(self.dec3(h))


class FullyConnectedVAE(VAE):
    """784-400-latent_dim-400-784 with ReLU, after Kingma & Welling (2014).

    It has 667,248 parameters with 32 latent dimensions. The report compares its network with "a
    fully connected VAE", which it does not describe.
    """

    def __init__(self, latent_dim=32):
        super().__init__()
        self.fc_enc = nn.Linear(28 * 28, 400)
        self.fc_mu = nn.Linear(400, latent_dim)
        self.fc_log = nn.Linear(400, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 400)
        self.fc_out = nn.Linear(400, 28 * 28)

    def features(self, x):
        """Return a tuple with the output of the only hidden layer, [N, 400]."""
        return (F.relu_(self.fc_enc(x.flatten(1))),)

    def decode(self, z):
        """Return images [N, 1, 28, 28] in [0, 1] for latent codes z [N, latent_dim]."""
        h = F.relu_(self.fc_dec(z))
        return torch.sigmoid(self.fc_out(h)).view(-1, 1, 28, 28)


class DeepConvVAE(VAE):
    """The deeper network that the report proposes: up to 256 filters, BatchNorm and LeakyReLU.

    It has 1,144,193 parameters with 32 latent dimensions.
    """

    def __init__(self, latent_dim=32):
        super().__init__()

        def block(layer):
            return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.LeakyReLU(0.2))

        self.enc = nn.Sequential(
            block(nn.Conv2d(1, 32, kernel_size=4, stride=2, padding=1)),  # 32×14×14
            block(nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1)),  # 64×7×7
            block(nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1)),  # 128×3×3
            block(nn.Conv2d(128, 256, kernel_size=3, stride=1, padding=1)),  # 256×3×3
        )
        self.fc_mu = nn.Linear(256 * 3 * 3, latent_dim)
        self.fc_log = nn.Linear(256 * 3 * 3, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 256 * 3 * 3)
        self.dec = nn.Sequential(
            block(nn.Conv2d(256, 128, kernel_size=3, stride=1, padding=1)),  # 128×3×3
            block(
                TransposedConv2d(128, 64, kernel_size=4, stride=2, padding=1, output_padding=1)
            ),  # 64×7×7
            block(TransposedConv2d(64, 32, kernel_size=4, stride=2, padding=1)),  # 32×14×14
            TransposedConv2d(32, 1, kernel_size=4, stride=2, padding=1),  # 1×28×28
        )

    def features(self, x):
        """Return the outputs of the four blocks, from [N, 32, 14, 14] to [N, 256, 3, 3]."""
        outputs = []
        for block in self.enc:
            x = block(x)
            outputs.append(x)
        return outputs

    def decode(self, z):
        """Return images [N, 1, 28, 28] in [0, 1] for latent codes z [N, latent_dim]."""
        h = F.leaky_relu(self.fc_dec(z), 0.2).view(-1, 256, 3, 3)
        return torch.sigmoid(self.dec(h))


# The networks by the name that they have in train.py's option --model.
MODELS = {"conv": ConvVAE, "fc": FullyConnectedVAE, "deep": DeepConvVAE}


def load_network(run):
    """Return the trained network of a `data.Run`, on the CPU and in evaluation mode.

    Raises UserError if the run has no weights, or if they do not fit the network.
    """
    name = run.config["model"]
    if name not in MODELS:
        raise UserError(
            f"{run.path} needs the network {name}, but MODELS in model.py does not have it. Add it."
        )
    path = run.path / WEIGHTS
    if not path.exists():
        raise UserError(
            f"{run.path} has no {WEIGHTS}. To train the network again, give train.py the options "
            f"in its {CONFIG}, and another folder with --run."
        )

    def parse_weights(content):
        model = MODELS[name](run.config["latent_dim"])
        model.load_state_dict(data.parse_tensors(content))
        return model.eval()

    return data.read(path, parse_weights)


# --- Loss ---------------------------------------------------------------------------------


def loss_function(recon_x, x, mu, logvar, beta=1.0):
    """Return the loss of a batch, BCE + beta * KLD, and its terms BCE and KLD.

    All three are in nats, summed over the batch. x and recon_x are [N, 1, 28, 28] in [0, 1], mu and
    logvar [N, latent_dim]. With beta = 1, this is the loss of the report; other values give a
    beta-VAE (Higgins et al., 2017). The feature-matching loss is not part of it; train_step in
    train.py adds it.

    A further term that is added to the loss here is minimized, but it is neither logged nor seen by
    the plateau schedule and classify.py, which use BCE and KLD alone. On CUDA, a training step is
    recorded, so this function must not read a value there, as `print` and `.item()` do.
    """
    bce = reconstruction_bce(recon_x, x)
    kld = kl_divergence(mu, logvar)
    return bce + beta * kld, bce, kld


def reconstruction_bce(recon_x, x):
    """Return the binary cross-entropy -Σ [x log x̂ + (1-x) log(1-x̂)] in nats.

    x and recon_x (x̂) are [N, 1, 28, 28] in [0, 1]. The sum runs over all pixels and images.
    """
    # For a NaN in recon_x, PyTorch's function ends with an error, after which a CUDA device cannot
    # be used any more. So we replace NaN by 0 and return NaN.
    is_nan = recon_x.isnan()
    bce = F.binary_cross_entropy(recon_x.masked_fill(is_nan, 0), x, reduction="sum")
    return bce.masked_fill(is_nan.any(), torch.nan)


def kl_divergence(mu, logvar):
    """Return KL(N(mu, sigma²) || N(0, I)) = -½ Σ (1 + log sigma² - mu² - sigma²) in nats.

    mu and logvar are [N, latent_dim]. The sum runs over all latent dimensions and images.
    """
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


# --- Latent means and samples -------------------------------------------------------------

# For latent means and the metrics of classify.py. The test loss in train.py has its own.
EVALUATION_BATCH_SIZE = 128


@torch.no_grad()
def latent_means(model, images):
    """Return the latent means mu(x) of images, [N, latent_dim] float32 on the CPU.

    Images are a tensor [N, 1, 28, 28] of floating-point numbers in [0, 1]. Raises ValueError
    otherwise. The model is used in evaluation mode, and stays as it is.
    """
    expected = (
        "images must be a tensor [N, 1, 28, 28] of floating-point numbers in [0, 1] "
        "(gray values divided by 255, bright on black)"
    )
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"{expected}, not a {type(images).__name__}")
    if images.shape[1:] != (1, 28, 28) or len(images) == 0 or not images.is_floating_point():
        raise ValueError(f"{expected}, not {list(images.shape)} of {images.dtype}")
    if not (images.min() >= 0 and images.max() <= 1):  # NaN is in no range
        raise ValueError(f"{expected}, not from {images.min()} to {images.max()}")
    # In float64 on the CPU, so that rounding differences between machines do not reach the Random
    # Forest.
    model = copy.deepcopy(model).cpu().eval().double()
    means = []
    for batch in images.split(EVALUATION_BATCH_SIZE):
        mu, _ = model.encode(batch.to("cpu", torch.float64))
        means.append(mu.float())
    return torch.cat(means)


def active_dimensions(mu):
    """Return how many latent dimensions are active: those whose mean mu has a variance above 0.01.

    mu is [N, latent_dim]. The definition is that of Burda et al. (2016).
    """
    return (mu.var(dim=0) > 0.01).sum().item()


def sample_mixture(model, images, n):
    """Draw n latent codes [n, latent_dim] from a mixture of Gaussians fitted to mu of images.

    This estimates where the latent codes of images lie (Ghosh et al., 2020). The mixture has at
    most 50 Gaussians with full covariances, fitted to the first 10,000 images, as chosen in
    results/mixture.txt. Each Gaussian needs 6 * latent_dim different latent means, so there are
    fewer Gaussians with more than 33 latent dimensions or with few images.

    The codes are in the order of the Gaussians, so the first ones alone are not a fair sample. The
    random state is fixed, so each call returns the same codes, whatever `torch.manual_seed` was.
    """
    # Imported here because train.py does not need scikit-learn, which takes a second to import.
    from sklearn.mixture import GaussianMixture

    # scikit-learn computes in the precision of its input, and float32 is too coarse for the
    # covariances of latent dimensions that are nearly constant.
    mu = latent_means(model, images[:10_000]).double()
    max_gaussians = len(mu.unique(dim=0)) // (6 * mu.shape[1])
    n_components = min(50, max(1, max_gaussians))
    mixture = GaussianMixture(n_components, tol=0.03, random_state=42)
    z, _ = mixture.fit(mu).sample(n)
    return torch.tensor(z).float()


# --- A faster transposed convolution ------------------------------------------------------


class TransposedConv2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d, computed in the way that is fastest on a CPU.

    The result is the same up to rounding, so a network may also use nn.ConvTranspose2d. On a CPU,
    PyTorch leaves convolutions to the library oneDNN, which is slow in two cases. One is a bias,
    which is therefore added separately. The other is a single output channel in float32, for which
    PyTorch has a faster kernel of its own.
    """

    def forward(self, x):
        """Return [N, out_channels, H', W'] for x [N, in_channels, H, W]."""
        # torch.compile, torch.export, ONNX export and autocast know only PyTorch's public function.
        use_fast_kernel = (
            self.out_channels == 1
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and not torch.compiler.is_compiling()
            and not torch.onnx.is_in_onnx_export()
            and not torch.is_autocast_enabled("cpu")
        )
        if use_fast_kernel:
            y = torch.ops.aten.slow_conv_transpose2d(
                x,
                self.weight,
                self.kernel_size,
                None,
                self.stride,
                self.padding,
                self.output_padding,
                self.dilation,
            )
        else:
            y = F.conv_transpose2d(
                x,
                self.weight,
                None,
                self.stride,
                self.padding,
                self.output_padding,
                self.groups,
                self.dilation,
            )
        if self.bias is not None:
            y.add_(self.bias.view(-1, 1, 1))
        return y
