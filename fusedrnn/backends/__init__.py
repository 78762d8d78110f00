"""What runs a call. Each backend says what it refuses, and runs a whole stack of layers.

refuses(call)                     why it cannot run the call, or None
forward(spec, operands, masks)    (output, *final states), which autograd sees through;
                                  triton's and the loop's, with what `backward` needs behind
"""
