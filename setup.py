"""Device sources lie in kernels_cuda/ in the checkout and in mpk_dynamo/kernels_cuda/ in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mpk_dynamo", "mpk_dynamo.*"]), "mpk_dynamo.kernels_cuda"],
    package_dir={"mpk_dynamo": "mpk_dynamo", "mpk_dynamo.kernels_cuda": "kernels_cuda"},
    package_data={"mpk_dynamo.kernels_cuda": ["include/**/*.cuh", "include/**/*.h"]},
)
