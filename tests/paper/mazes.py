"""D4RL's mazes as Gymnasium environments, without d4rl or mujoco-py. Importing this file registers
them. In the folder of the scripts:

    env = gym.make("tests.paper.mazes:maze2d-umaze-v1")
"""

import warnings
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np

if tuple(int(part) for part in mujoco.__version__.split(".")[:2]) >= (3, 5):
    warnings.warn("mujoco 3.5 and later add up contact margins: not D4RL's dynamics; install 3.4.0")

WALL = "#"
FREE = "."
MAZES = {  # D4RL's; a position (i, j) is row i, column j
    "umaze": """
        #####
        #...#
        ###.#
        #...#
        #####""",
    "medium": """
        ########
        #..##..#
        #..#...#
        ##...###
        #..#...#
        #.#..#.#
        #...#..#
        ########""",
    "large": """
        ############
        #....#.....#
        #.##.#.#.#.#
        #......#...#
        #.####.###.#
        #..#.#.....#
        ##.#.#.#.###
        #..#...#...#
        ############""",
}


def maze_cells(maze, kind):
    """The positions (i, j) of all cells of a kind, WALL or FREE."""
    cells = []
    for i, row in enumerate(MAZES[maze].split()):
        for j, cell in enumerate(row):
            if cell == kind:
                cells.append((i, j))
    return cells


class Maze2d(gym.Env):
    """D4RL's maze2d: a ball is pushed through a maze to a goal, the same in every episode.

    Observation: [x, y, vx, vy]; x grows with the row, and the middle of cell (i, j) is at
    (i - 0.2, j - 0.2). Action: the force, in [-1, 1]^2. Reward: 1 for a step that ends within 0.5
    of the goal. Only the time limit ends an episode."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    XML = """
        <mujoco>
          <compiler inertiafromgeom="true"/>
          <option timestep="0.01" gravity="0 0 0" iterations="20"/>
          <default>
            <joint type="slide" damping="1"/>
            <motor ctrlrange="-1 1" ctrllimited="true" gear="100"/>
            <geom friction=".5 .1 .1" density="1000" margin=".002"
                  condim="1" contype="2" conaffinity="1"/>
          </default>
          <worldbody>
            <body pos="1.2 1.2 0">
              <geom type="sphere" size=".1" contype="1"/>
              <joint name="x" axis="1 0 0"/> <joint name="y" axis="0 1 0"/>
            </body>
          </worldbody>
          <actuator> <motor joint="x"/> <motor joint="y"/> </actuator>
        </mujoco>"""

    def __init__(self, maze, goal):
        spec = mujoco.MjSpec.from_string(self.XML)
        for i, j in maze_cells(maze, WALL):
            wall = spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX)
            wall.size = [0.5, 0.5, 0.2]
            wall.pos = [i + 1, j + 1, 0]
        self.model = spec.compile()
        self.physics = mujoco.MjData(self.model)
        self.cells = maze_cells(maze, FREE)
        self.goal = np.array(goal)

    def observation(self):
        return np.concatenate([self.physics.qpos, self.physics.qvel])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.physics)
        cell = self.cells[self.np_random.integers(len(self.cells))]
        # D4RL starts at the cell's numbers, 0.2 off its middle
        self.physics.qpos[:] = cell + self.np_random.uniform(-0.1, 0.1, 2)
        self.physics.qvel[:] = 0.1 * self.np_random.standard_normal(2)
        return self.observation(), {}

    def step(self, action):
        self.physics.qvel[:] = np.clip(self.physics.qvel, -5, 5)
        self.physics.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.physics)
        at_goal = np.linalg.norm(self.physics.qpos - self.goal) <= 0.5
        return self.observation(), float(at_goal), False, False, {}


class AntMaze(gym.Env):
    """D4RL's antmaze: an ant walks from cell (1, 1) to a goal, drawn anew in every episode.

    Cells are 4 m wide. Observation [29]: 15 positions, 14 velocities. Action [8]: torques.
    Reward: 1 within 0.5 m of the goal, which ends the episode."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (8,), np.float32)
    XML = Path(gym.__file__).parent / "envs/mujoco/assets/ant.xml"

    def __init__(self, maze, goal):
        spec = mujoco.MjSpec.from_file(str(self.XML))
        spec.option.timestep = 0.02
        for i, j in maze_cells(maze, WALL):
            wall = spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX)
            wall.size = [2, 2, 1]
            wall.pos = [4 * (j - 1), 4 * (i - 1), 1]  # x grows with the column here
            wall.conaffinity = 1
        for geom in spec.geoms:
            geom.solimp[:3] = [0.8, 0.8, 0.01]
        for motor in spec.actuators:
            motor.gear[0] = 30  # 150 in Gymnasium
        self.model = spec.compile()
        self.physics = mujoco.MjData(self.model)
        self.goal_middle = np.array([4 * (goal[1] - 1), 4 * (goal[0] - 1)])

    def observation(self):
        return np.concatenate([self.physics.qpos, self.physics.qvel])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.physics)
        # Both noises and the limit are D4RL's
        noise = self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)
        self.goal = np.maximum(self.goal_middle + noise, 0)
        self.physics.qpos += self.np_random.uniform(-0.1, 0.1, self.model.nq)
        self.physics.qvel[:] = 0.1 * self.np_random.standard_normal(self.model.nv)
        mujoco.mj_forward(self.model, self.physics)
        return self.observation(), {}

    def step(self, action):
        self.physics.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.physics, nstep=5)
        reached = bool(np.linalg.norm(self.physics.qpos[:2] - self.goal) <= 0.5)
        return self.observation(), float(reached), reached, False, {}


def register(name, env_class, maze, goal, time_limit):
    kwargs = dict(maze=maze, goal=goal)  # the goal is a cell
    gym.register(name, env_class, max_episode_steps=time_limit, kwargs=kwargs)


register("maze2d-umaze-v1", Maze2d, "umaze", goal=(1, 1), time_limit=300)
register("maze2d-medium-v1", Maze2d, "medium", goal=(6, 6), time_limit=600)
register("maze2d-large-v1", Maze2d, "large", goal=(7, 9), time_limit=800)
register("antmaze-umaze-v2", AntMaze, "umaze", goal=(3, 1), time_limit=700)
register("antmaze-medium-play-v2", AntMaze, "medium", goal=(6, 6), time_limit=1000)
register("antmaze-large-play-v2", AntMaze, "large", goal=(7, 9), time_limit=1000)
