"""What the four stages of the kit share, in six rooms; imports run one way, from first to last.

base      config, processes, launch, files, log: nothing about faces
data      from a file to a batch; who is public and who is private
nets      checkpoints, recognisers, embeddings, training
measure   what a recogniser is worth, who is found
privacy   protections, releases, attackers
report    tables, pictures, the page of a run
check     before the first stage
"""
