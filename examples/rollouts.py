"""What reinforcement learning and decoding need: single steps, and episodes that end anywhere.

    python examples/rollouts.py

A recurrent policy acts step by step (module.step), is trained on chunks in which episodes end at
any time (reset=), begins each of them in a state that it learns (reset=(mask, state)), and never
looks further back than one chunk (module.stream).
"""

import torch
from torch import nn

import fusedrnn


class Policy(nn.Module):
    def __init__(self, observations: int, hidden: int, actions: int):
        super().__init__()
        self.rnn = fusedrnn.GRU(observations, hidden)
        self.head = nn.Linear(hidden, actions)
        self.h_0 = nn.Parameter(torch.zeros(1, 1, hidden))  # learned, one for all episodes


def main(updates: int = 3, T: int = 16, B: int = 8) -> None:
    torch.manual_seed(0)
    policy = Policy(observations=4, hidden=32, actions=2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    h = policy.h_0.expand(-1, B, -1).detach()

    for update in range(updates):
        # Act. first[t, b]: whether an episode begins with step t of environment b.
        begin, observations, first, outputs = h, torch.randn(T, B, 4), torch.rand(T, B) < 0.1, []
        with torch.no_grad():
            for x, begins in zip(observations, first, strict=True):
                h = torch.where(begins[:, None], policy.h_0, h)
                output, h = policy.rnn.step(x, h)
                outputs.append(output)

        # Learn, from the same chunk at once: the same numbers.
        output, _ = policy.rnn(observations, begin, reset=(first, policy.h_0))
        torch.testing.assert_close(output, torch.stack(outputs))
        loss = policy.head(output).square().mean()  # in the place of a policy gradient
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"update {update}: {int(first.sum())} episodes began, loss {loss.item():.4f}")

    # The same for a stream of chunks without the bookkeeping.
    stream = policy.rnn.stream()
    for _ in range(updates):
        stream(torch.randn(T, B, 4), reset=torch.rand(T, B) < 0.1).sum().backward()
        stream.reset(rows=torch.rand(B) < 0.1)  # episodes that ended with the chunk
    print("stream: state", tuple(stream.state.shape))


if __name__ == "__main__":
    main()
