"""What a way to train would keep, send and save: arithmetic on shapes, before anything is trained."""
