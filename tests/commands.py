"""Commands of the command line, run in this process."""

from typer.testing import CliRunner

from tidal_compile.cli import app


def run(*arguments):
    """Exit code, standard output, and what was raised."""
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    return done.exit_code, done.stdout, done.exception


def quick(*arguments):
    """Run in this process: standard output of a command that must succeed."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
