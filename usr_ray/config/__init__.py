"""One configuration for a whole run; the sections are the modules beside this one. Standard library only."""

from usr_ray.config.etl import (
    FeaturesConfig,
    HistoriesConfig,
    JdSearchConfig,
    KuaiRandConfig,
    KuaiSarConfig,
    KuaiSearchConfig,
    LabelsConfig,
    SimulatedConfig,
    VocabularyConfig,
)
from usr_ray.config.fields import (
    DAY_US,
    SHOWN_RANGES,
    ConfigError,
    UserError,
    check_address,
    check_table_address,
    date_of,
    date_ranges,
    dates_in,
    dates_there,
    day_number,
    differences,
    dotted,
    end_of_us,
    first_difference,
    parse_date,
    parse_dates,
    parse_duration_us,
)
from usr_ray.config.logs import LogConfig, OnlineConfig
from usr_ray.config.model import (
    BACKBONES,
    ContrastiveConfig,
    GeneratorConfig,
    InterestConfig,
    ModelConfig,
    MultitaskConfig,
)
from usr_ray.config.root import Config, load_config
from usr_ray.config.training import DataConfig, RayConfig, SpaceConfig, TrainConfig, TuneConfig
