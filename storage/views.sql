-- The views of a store. Fed with two Arrow tables: row_files (every valid row, with its file, and whether it is the
-- chosen one of its task) and plan (every sweep's newest expansion, one line per task).

-- Every valid row: several for one task are legal.
create view attempts as select * exclude (chosen) from row_files;

-- The chosen row per task (storage/rowfiles.py:chosen).
create view rows as select * exclude (file, chosen) from row_files where chosen;

-- One line per planned task of a sweep, with its row; status done, failed or pending.
create view tasks as
select p.sweep, p.position, p.shard, p.task_id, p.cell_id, p.candidate_id, p.model, p.dataset,
       p.dense_id, p.granularity, p.layers, p.ratios, p.pruning_ratio, p.pruner, p.propagation,
       p.schedule, p.precision, p.recipe_id, p.recipe, p.candidate, p.seed,
       coalesce(r.status, 'pending') as status,
       r.* exclude (task_id, cell_id, candidate_id, model, dataset, dense_id, granularity, layers,
                    ratios, pruning_ratio, pruner, propagation, schedule, precision, recipe_id,
                    recipe, candidate, seed, status)
from plan p left join rows r on r.task_id = p.task_id;

-- The mean over a candidate's seeds. Null unless every seed has the value: the mean over those that did
-- not diverge would be of the survivors. Accuracies are rounded to 12 digits: equal sums of fractions
-- must be equal means, or ties in tau and in the anomaly ratio would be broken by rounding errors.
create macro over_seeds(x, n) as case when count(x) = n then avg(x) end;

-- Tasks averaged over seeds: mean under the name of what it averages, sample std beside it. Only
-- candidates with every planned seed done.
create view candidates as
select sweep, cell_id, candidate, any_value(candidate_id) as candidate_id,
       any_value(model) as model, any_value(dataset) as dataset,
       any_value(granularity) as granularity, any_value(layers) as layers,
       any_value(ratios) as ratios, any_value(pruning_ratio) as pruning_ratio,
       any_value(pruner) as pruner, any_value(propagation) as propagation,
       any_value(schedule) as schedule, any_value(precision) as precision,
       any_value(removed) as removed, count(*) as n_seeds,
       count(distinct dense_sha256) as n_dense, min(dense_sha256) as dense_sha256,
       any_value(params) as params, any_value(macs) as macs,
       any_value(achieved_ratio) as achieved_ratio,
       over_seeds(dense_train_loss, count(*)) as dense_train_loss,
       over_seeds(dense_test_loss, count(*)) as dense_test_loss,
       round(over_seeds(dense_test_accuracy, count(*)), 12) as dense_test_accuracy,
       over_seeds(pruned_train_loss, count(*)) as pruned_train_loss,
       over_seeds(pruned_train_loss_se, count(*)) as pruned_train_loss_se,
       over_seeds(pruned_test_loss, count(*)) as pruned_test_loss,
       round(over_seeds(pruned_test_accuracy, count(*)), 12) as pruned_test_accuracy,
       max(equivalence_error) as equivalence_error,
       over_seeds(best_epoch, count(*)) as best_epoch, stddev_samp(best_epoch) as best_epoch_std,
       round(over_seeds(best_test_accuracy, count(*)), 12) as best_test_accuracy, stddev_samp(best_test_accuracy) as best_test_accuracy_std,
       over_seeds(best_test_loss, count(*)) as best_test_loss, stddev_samp(best_test_loss) as best_test_loss_std,
       over_seeds(last_train_loss, count(*)) as last_train_loss, stddev_samp(last_train_loss) as last_train_loss_std,
       over_seeds(last_test_loss, count(*)) as last_test_loss, stddev_samp(last_test_loss) as last_test_loss_std,
       round(over_seeds(last_test_accuracy, count(*)), 12) as last_test_accuracy, stddev_samp(last_test_accuracy) as last_test_accuracy_std,
       over_seeds(last5_test_loss_mean, count(*)) as last5_test_loss_mean, stddev_samp(last5_test_loss_mean) as last5_test_loss_mean_std,
       round(over_seeds(last5_test_accuracy_mean, count(*)), 12) as last5_test_accuracy_mean, stddev_samp(last5_test_accuracy_mean) as last5_test_accuracy_mean_std,
       round(over_seeds(val_best_test_accuracy, count(*)), 12) as val_best_test_accuracy, stddev_samp(val_best_test_accuracy) as val_best_test_accuracy_std,
       over_seeds(val_best_test_loss, count(*)) as val_best_test_loss, stddev_samp(val_best_test_loss) as val_best_test_loss_std,
       any_value(score_l1) as score_l1, any_value(score_l2) as score_l2, any_value(score_taylor) as score_taylor,
       any_value(score_hessian) as score_hessian, any_value(score_fpgm) as score_fpgm,
       any_value(score_lamp) as score_lamp, any_value(score_bn_scale) as score_bn_scale,
       any_value(score_activation) as score_activation, any_value(score_extra) as score_extra,
       count(*) filter (where diverged) as n_diverged
from tasks group by sweep, cell_id, candidate
having count(*) filter (where status <> 'done') = 0;

-- One line per cell of a sweep: what was planned and what is there.
create view cells as
select t.sweep, t.cell_id, any_value(model) as model, any_value(dataset) as dataset,
       any_value(layers) as layers, any_value(ratios) as ratios,
       any_value(pruning_ratio) as pruning_ratio, any_value(pruner) as pruner,
       any_value(granularity) as granularity, any_value(propagation) as propagation,
       any_value(precision) as precision, any_value(recipe_id) as recipe_id,
       any_value(recipe) as recipe,
       count(distinct candidate) as candidates, count(distinct seed) as seeds, count(*) as tasks,
       count(*) filter (where status = 'done') as done,
       count(*) filter (where status = 'failed') as failed,
       count(*) filter (where status = 'pending') as pending,
       min(position) as position
from tasks t group by t.sweep, t.cell_id;

-- One line per sweep.
create view sweeps as
select sweep, any_value(expanded_at) as expanded_at, count(distinct p.cell_id) as cells,
       count(*) as tasks, count(*) filter (where r.status = 'done') as done,
       count(*) filter (where r.status = 'failed') as failed,
       count(*) filter (where r.status is null) as pending,
       max(r.finished_at) as last_row_at
from plan p left join rows r on r.task_id = p.task_id group by sweep;

-- What failed, by class and shard, with one example.
create view failures as
select sweep, error_class, shard, count(*) as tasks, min(task_id) as example_task,
       arg_min(error, task_id) as example_error, max(finished_at) as last_at
from tasks where status = 'failed' group by sweep, error_class, shard;

-- Long form of what is known of a candidate before retraining: one line per criterion that has a number,
-- beside what there was after it.
create view criteria as
select * exclude (found, score_of), score_of.criterion, score_of.score from (
    select *, unnest(found) as score_of from (
        select sweep, cell_id, candidate, candidate_id, model, dataset, granularity, layers, ratios, pruning_ratio,
               pruner, propagation, schedule, precision, n_seeds,
               best_test_accuracy, best_test_loss, last_train_loss, last_test_loss, last_test_accuracy,
               last5_test_loss_mean, last5_test_accuracy_mean, val_best_test_accuracy, val_best_test_loss,
               list_concat(
                   [{criterion: 'pruned_train_loss', score: pruned_train_loss}, {criterion: 'l1', score: score_l1},
                    {criterion: 'l2', score: score_l2}, {criterion: 'taylor', score: score_taylor},
                    {criterion: 'hessian', score: score_hessian}, {criterion: 'fpgm', score: score_fpgm},
                    {criterion: 'lamp', score: score_lamp}, {criterion: 'bn_scale', score: score_bn_scale},
                    {criterion: 'activation', score: score_activation}],
                   [{criterion: e.key, score: e.value} for e in map_entries(score_extra)]) as found
        from candidates)
) where score_of.score is not null;

-- One line per task and epoch: 0 is before retraining, 1 the first epoch. The mean minibatch loss of epoch 0 is
-- nothing: pruned_train_loss is another measure.
create view curves as
select sweep, cell_id, candidate, seed, task_id, epoch,
       case when epoch > 0 then epoch_train_loss[epoch] end as epoch_train_loss,
       case when epoch = 0 then pruned_test_loss else epoch_test_loss[epoch] end as epoch_test_loss,
       case when epoch = 0 then pruned_test_accuracy else epoch_test_accuracy[epoch] end as epoch_test_accuracy,
       case when epoch > 0 then epoch_val_accuracy[epoch] end as epoch_val_accuracy
from (
    select sweep, cell_id, candidate, seed, task_id, epoch_train_loss, epoch_test_loss, epoch_test_accuracy,
           epoch_val_accuracy, pruned_test_loss, pruned_test_accuracy,
           unnest(range(0, 1 + greatest(0, len(epoch_train_loss), len(epoch_test_loss), len(epoch_test_accuracy),
                                        len(epoch_val_accuracy)))) as epoch
    from tasks where status = 'done');

-- What was spent on each cell of a sweep, in seconds of one CPU worker's or one GPU's time. Wasted are failed
-- attempts and rows that were not chosen. A failed row knows no device: it ran where the cell's others did.
-- Of a failed attempt the time from its start to its end counts, which is not shared out.
create view cost as
select p.sweep, p.cell_id, any_value(p.model) as model, any_value(p.dataset) as dataset, any_value(p.layers) as layers,
       any_value(p.pruning_ratio) as pruning_ratio, any_value(p.pruner) as pruner,
       any_value(p.propagation) as propagation, any_value(p.precision) as precision,
       count(distinct p.task_id) as tasks, count(a.task_id) as attempts,
       count(a.task_id) filter (where a.status = 'failed') as failed_attempts,
       count(a.task_id) filter (where a.wasted) as wasted_attempts,
       coalesce(sum(a.seconds) filter (where not a.on_gpu), 0) as cpu_seconds,
       coalesce(sum(a.seconds) filter (where a.on_gpu), 0) as gpu_seconds,
       coalesce(sum(a.seconds) filter (where a.wasted and not a.on_gpu), 0) as wasted_cpu_seconds,
       coalesce(sum(a.seconds) filter (where a.wasted and a.on_gpu), 0) as wasted_gpu_seconds,
       min(p.position) as position
from plan p left join (
    select task_id, status, status = 'failed' or not chosen as wasted,
           coalesce(device, max(device) over (partition by cell_id), 'cpu') not like 'cpu%' as on_gpu,
           coalesce(seconds_prune + seconds_retrain, epoch(finished_at - started_at)) as seconds
    from row_files) a on a.task_id = p.task_id
group by p.sweep, p.cell_id;
