"""Diffusion's training and the agents as the public codes write them (SynthER, CORL, REDQ, V-D4RL),
with the first weights of ours. Tests compare the losses of both, and bench.py the times.

A function of an agent takes that of a script, and returns its update(i, ...) number i = 0, 1, ...,
on the parts of a batch, [batch, columns] each. An update returns its losses in our order, as
numbers."""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def members(ensemble):
    """The members of an EnsembleCritic as ordinary networks with the same weights."""
    nets = nn.ModuleList()
    for k in range(len(ensemble.weights[0])):
        layers = []
        for weight, bias in zip(ensemble.weights, ensemble.biases):
            layers += [nn.Linear(*weight.shape[1:], device=weight.device), nn.ReLU()]
            layers[-2].load_state_dict(dict(weight=weight[k].T, bias=bias[k, 0]))
        nets.append(nn.Sequential(*layers[:-1]))
    return nets


def adam(args, *parts):
    params = []
    for part in parts:
        params += part.parameters() if isinstance(part, nn.Module) else [part]
    return torch.optim.Adam(params, lr=args.learning_rate)


def descend(loss, *optimizers):
    """One step. The value of the loss goes to the log at every update, as in the public codes."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def follow(targets, networks, tau):
    for slow, fast in zip(targets.parameters(), networks.parameters()):
        slow.data.copy_(tau * fast.data + (1 - tau) * slow.data)


def values(critics, s, a):
    return [critic(torch.cat([s, a], 1)) for critic in critics]


def cloning_loss(q, policy_a, a):
    """TD3+BC's loss of the actor."""
    return -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(policy_a, a)


def sample(actor, s, lowest):
    """Actions of a squashed Gaussian, and their log-densities [batch, 1]."""
    h = actor.net(s)
    normal = torch.distributions.Normal(actor.mean(h), actor.log_std(h).clamp(lowest, 2).exp())
    raw = normal.rsample()
    a = torch.tanh(raw)
    log_density = normal.log_prob(raw) - torch.log(1 - a.pow(2) + 1e-6)
    return a, log_density.sum(1, keepdim=True)


def plain_denoised(model, x, sigma):
    """D_theta of an EDM for rows x [batch, dim] and noise levels sigma [batch, 1]. Waves have their
    mean factor under the noise in x."""
    net = model.denoiser
    recipe = model.recipe

    def linear(layer, h):
        return F.linear(h, layer.weight, layer.bias)

    def activation(h):
        if not recipe.gated:
            return F.relu(h)
        h, gate = h.chunk(2, dim=1)
        return h * F.gelu(gate)

    scale = torch.sqrt(sigma**2 + 1)
    frequencies = [math.pi * 2**k for k in range(recipe.waves)]
    factors = [torch.exp(-(w**2) * (sigma / scale) ** 2 / 2) for w in frequencies]
    sines = [factor * torch.sin(w * x / scale) for w, factor in zip(frequencies, factors)]
    cosines = [factor * torch.cos(w * x / scale) for w, factor in zip(frequencies, factors)]
    c_noise = torch.log(sigma) / 4
    angles = 2 * math.pi * c_noise * net.frequencies
    t = linear(net.time_mlp[0], torch.cat([c_noise, angles.sin(), angles.cos()], dim=1))
    t = linear(net.time_mlp[2], F.silu(t))
    h = linear(net.row_in, torch.cat([x / scale, *sines, *cosines], dim=1))
    h = linear(net.hidden_in, h + t)
    for block in net.blocks:
        h = linear(block, activation(h)) + (h if recipe.residual else 0)
    return x / scale**2 + sigma / scale * linear(net.out, activation(h))


def plain_training(model, rows, lr, steps, decay_limit=0.995):
    """A step(k) of diffusion: rows come from the host, the loss goes to a log. step.average is the
    moving average of the denoiser's parameters. A step returns its loss and the gradient's norm."""
    recipe = model.recipe
    params = list(model.denoiser.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=recipe.betas, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def step(k):
        x = rows[torch.randint(len(rows), (recipe.batch_size,))].to(params[0].device)
        sigma = torch.exp(-1.2 + 1.2 * torch.randn(len(x), 1, device=x.device))
        error = plain_denoised(model, x + sigma * torch.randn_like(x), sigma) - x
        loss = ((sigma**2 + 1) / sigma**2 * error**2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, recipe.clip)
        optimizer.step()
        schedule.step()
        if k % 10 == 0:
            decay = min(decay_limit, 1 - (1 + k - 100) ** (-2 / 3)) if k > 100 else 0
            for a, p in zip(average, params):
                a.lerp_(p.detach(), 1 - decay)
        return loss.item(), norm

    step.average = average
    return step


def plain_td3bc(agent):
    """Three networks with an optimiser each."""
    args = agent.args
    limit = agent.max_action
    actor = copy.deepcopy(agent.actor.net)
    critics = members(agent.critic)
    actor_target, targets = copy.deepcopy([actor, critics])
    actor_optimizer, *critic_optimizers = [adam(args, net) for net in (actor, *critics)]

    def update(i, s, a, r, next_s, done):
        with torch.no_grad():
            noise = (torch.randn_like(a) * 0.2).clamp(-0.5, 0.5) * limit
            next_a = (limit * actor_target(next_s) + noise).clamp(-limit, limit)
            y = r + (1 - done) * 0.99 * torch.min(*values(targets, next_s, next_a))
        loss = sum(F.mse_loss(q, y) for q in values(critics, s, a))
        losses = [descend(loss, *critic_optimizers)]
        if i % 2 == 1:
            policy_a = limit * actor(s)
            (q,) = values(critics[:1], s, policy_a)
            losses.append(descend(cloning_loss(q, policy_a, a), actor_optimizer))
            follow(targets, critics, args.tau)
            follow(actor_target, actor, args.tau)
        return losses

    return update


def plain_iql(agent):
    """Four networks, three optimisers, a distribution object."""
    args = agent.args
    limit = agent.actor.max_action
    mean, log_std = copy.deepcopy([agent.actor.net, agent.actor.log_std])
    (value,) = members(agent.value)
    critics = members(agent.critic)
    targets = copy.deepcopy(critics)
    value_optimizer, critic_optimizer = [adam(args, net) for net in (value, critics)]
    actor_optimizer = adam(args, mean) if args.deterministic else adam(args, mean, log_std)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(actor_optimizer, args.updates)

    def update(i, s, a, r, next_s, done):
        with torch.no_grad():
            y = r + (1 - done) * 0.99 * value(next_s)
            target_q = torch.min(*values(targets, s, a))
        advantage = target_q - value(s)
        weight = torch.abs(args.expectile - (advantage < 0).to(s))
        value_loss = descend(torch.mean(weight * advantage**2), value_optimizer)
        loss = sum(F.mse_loss(q, y) for q in values(critics, s, a)) / 2
        critic_loss = descend(loss, critic_optimizer)
        follow(targets, critics, args.tau)
        weight = torch.exp(args.beta * advantage.detach()).clamp(max=100.0).squeeze(-1)
        if args.deterministic:
            cloning = ((limit * mean(s) - a) ** 2).sum(1)
        else:
            scale = torch.diag(torch.exp(log_std.clamp(-5.0, 2.0)))
            policy = torch.distributions.MultivariateNormal(limit * mean(s), scale_tril=scale)
            cloning = -policy.log_prob(a)
        actor_loss = descend(torch.mean(weight * cloning), actor_optimizer)
        schedule.step()
        return critic_loss, value_loss, actor_loss

    return update


def ensemble_values(critic, s, a):
    """Q [num_q, batch] as CORL's EDAC computes them."""
    x = torch.cat([s, a], dim=-1)
    if x.dim() == 2:
        x = x.unsqueeze(0).repeat_interleave(len(critic.weights[0]), dim=0)
    for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases)):
        x = (torch.relu(x) if i else x) @ weight + bias
    return x.squeeze(-1)


def plain_edac(agent):
    """Autograd of the gradients by the actions. A product for each pair of critics (Equation 4)."""
    args = agent.args
    limit = agent.actor.max_action
    num_q = args.num_q
    actor, critic, log_alpha = copy.deepcopy([agent.actor, agent.critic, agent.log_alpha])
    target = copy.deepcopy(critic)
    optimizers = [adam(args, part) for part in (log_alpha, actor, critic)]
    alpha_optimizer, actor_optimizer, critic_optimizer = optimizers

    def update(i, s, a, r, next_s, done):
        _, log_density = sample(actor, s, -5)
        descend((-log_alpha * (log_density.detach() - a.shape[1])).mean(), alpha_optimizer)
        alpha = log_alpha.exp().detach()
        policy_a, log_density = sample(actor, s, -5)
        q = ensemble_values(critic, s, limit * policy_a).min(0).values.unsqueeze(-1)
        actor_loss = descend((alpha * log_density - q).mean(), actor_optimizer)
        with torch.no_grad():
            next_a, next_log_density = sample(actor, next_s, -5)
            next_q = ensemble_values(target, next_s, limit * next_a).min(0).values.unsqueeze(-1)
            y = r + 0.99 * (1 - done) * (next_q - alpha * next_log_density)
        critic_loss = ((ensemble_values(critic, s, a) - y.view(1, -1)) ** 2).mean(dim=1).sum(dim=0)
        many_s = s.unsqueeze(0).repeat_interleave(num_q, dim=0)
        many_a = a.unsqueeze(0).repeat_interleave(num_q, dim=0).requires_grad_(True)
        q_sum = ensemble_values(critic, many_s, many_a).sum()
        (e,) = torch.autograd.grad(q_sum, many_a, retain_graph=True, create_graph=True)
        e = (e / (torch.norm(e, p=2, dim=2).unsqueeze(-1) + 1e-10)).transpose(0, 1)
        products = torch.einsum("bik,bjk->bij", e, e)
        others = 1 - torch.eye(num_q, device=s.device).unsqueeze(0).repeat(len(s), 1, 1)
        diversity = (others * products).sum(dim=(1, 2)).mean() / (num_q - 1)
        descend(critic_loss + args.eta * diversity, critic_optimizer)
        follow(target, critic, args.tau)
        return critic_loss.item(), diversity.item(), actor_loss, alpha.item()

    return update


def plain_sac(agent):
    """A network and an optimiser for each critic, in the order of REDQ's code."""
    args = agent.args
    num_q = args.num_q
    actor, log_alpha = copy.deepcopy([agent.actor, agent.log_alpha])
    alpha = 0.2
    critics = members(agent.critic)
    targets = copy.deepcopy(critics)
    parts = (actor, log_alpha, *critics)
    actor_optimizer, alpha_optimizer, *critic_optimizers = [adam(args, part) for part in parts]

    def update(i, s, a, r, next_s, done):
        nonlocal alpha
        with torch.no_grad():
            next_a, next_log_density = sample(actor, next_s, -20)
            two = [targets[k] for k in torch.rand(num_q).argsort(descending=True)[:2].tolist()]
            next_q = torch.cat(values(two, next_s, next_a), 1).min(dim=1, keepdim=True).values
            y = r + 0.99 * (1 - done) * (next_q - alpha * next_log_density)
        q = torch.cat(values(critics, s, a), 1)
        critic_loss = F.mse_loss(q, y.expand(-1, num_q)) * num_q
        critics.zero_grad()
        critic_loss.backward()
        actor_loss = 0.0
        if i % args.utd == args.utd - 1:
            critics.requires_grad_(False)
            policy_a, log_density = sample(actor, s, -20)
            q = torch.cat(values(critics, s, policy_a), 1).mean(1, keepdim=True)
            actor_loss = descend((alpha * log_density - q).mean(), actor_optimizer)
            critics.requires_grad_(True)
            excess = (log_density + agent.target_entropy).detach()
            descend(-(log_alpha * excess).mean(), alpha_optimizer)
            alpha = log_alpha.exp().item()
        for optimizer in critic_optimizers:
            optimizer.step()
        follow(targets, critics, args.tau)
        return critic_loss.item(), actor_loss

    return update


def plain_drqbc(agent):
    """DrQ+BC, and BC, which has no critic. In stage 2 from latents."""
    args = agent.args
    has_critic = args.algo == "drqbc"
    parts = [agent.encoder, agent.actor_trunk, agent.critic_trunk, agent.policy]
    encoder, actor_trunk, critic_trunk, policy = copy.deepcopy(parts)
    for layer in encoder.modules():
        layer.inplace = False  # of its ReLUs
    critics = members(agent.critic)
    critic = nn.ModuleList([critic_trunk, critics])
    target = copy.deepcopy(critic)
    critic_optimizer = adam(args, critic, encoder)
    actor_optimizer = adam(args, actor_trunk, policy, *([] if has_critic else [encoder]))

    def encode(x):
        return encoder.net(x / 255.0 - 0.5) if agent.stage == "stage1" else x

    def noisy_action(h, noise):
        mean = policy(actor_trunk(h))
        raw = mean + torch.clamp(torch.randn_like(mean) * noise, -0.3, 0.3)
        return raw - raw.detach() + torch.clamp(raw, -1 + 1e-6, 1 - 1e-6).detach()

    def update(i, x, a, r, discount, next_x, noise):
        h = encode(x)
        critic_loss = 0.0
        if has_critic:
            with torch.no_grad():
                next_h = encode(next_x)
                next_q = values(target[1], target[0](next_h), noisy_action(next_h, noise))
                y = r[:, None] + discount[:, None] * torch.min(*next_q)
            loss = sum(F.mse_loss(q, y) for q in values(critics, critic_trunk(h), a))
            critic_loss = descend(loss, critic_optimizer)
            h = h.detach()
        policy_a = noisy_action(h, noise)
        loss = F.mse_loss(policy_a, a)
        if has_critic:
            q = torch.min(*values(critics, critic_trunk(h), policy_a))
            loss = cloning_loss(q, policy_a, a)
        actor_loss = descend(loss, actor_optimizer)
        follow(target, critic, 0.01)
        return critic_loss, actor_loss

    return update
