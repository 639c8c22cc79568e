"""Everything that is committed, made again."""
import subprocess

from analysis import all as everything


def test_each_command_runs_in_turn_and_the_first_that_fails_ends_it(monkeypatch, capsys):
    ran = []

    def run(words, cwd, check):
        assert check and cwd == everything.ROOT
        ran.append(words[1:])
        if len(ran) == 3:
            raise subprocess.CalledProcessError(1, words)

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("sys.argv", ["all"])
    try:
        everything.main()
    except subprocess.CalledProcessError:
        pass
    assert [words[:2] for words in ran] == [command.split()[:2] for command in everything.COMMANDS[:3]]
    assert "analysis.frontier" in capsys.readouterr().out


def test_every_command_is_a_module_that_is_there_and_the_notebooks_are_named():
    modules = [command.split()[1] for command in everything.COMMANDS]
    assert all((everything.ROOT / f"{module.replace('.', '/')}.py").exists() for module in modules
               if module.startswith("analysis."))
    assert len([*everything.ROOT.glob(everything.COMMANDS[-1].split()[-1])]) >= 6
