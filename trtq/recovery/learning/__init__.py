"""Learning ranges, biases and weights with the fp32 model as the teacher."""
